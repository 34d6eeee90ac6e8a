"""Database URLs as people may see them."""

from __future__ import annotations

from sqlalchemy import URL

SECRETS = ("password", "sslpassword", "passfile")
"""What a URL's query may hold that must stay secret, besides the password in its usual place."""


def shown_url(url: URL) -> str:
    """A URL for messages, its passwords hidden, wherever they stand."""
    hidden = {key: "hidden" for key in SECRETS if key in url.query}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)
