"""One sequence on several processes: each has a part of the tokens, and they exchange what slots have read."""
