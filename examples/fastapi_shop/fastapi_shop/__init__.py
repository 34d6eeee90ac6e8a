"""A shop that sells over HTTP: `uvicorn --factory fastapi_shop.app:create_app`."""
