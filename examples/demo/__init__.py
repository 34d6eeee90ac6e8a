"""A walk through sagalog in under a minute: `make demo`, or `python -m examples.demo`.

It plays a shop. An order takes three steps in three other systems: tea is
reserved, a card is charged, a courier is booked. No database transaction spans
them, and the shop's process is killed in the middle of five orders.

Read `shop.py` first: it is all that a user of sagalog writes. `outside.py` is
the bank, the warehouse and the courier; `killed.py` is the process that dies;
`trading.py` recovers what it left, and counts money and stock.
"""
