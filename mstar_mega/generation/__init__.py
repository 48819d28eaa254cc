"""The coupled engine: prefill a query once, decode its n responses together."""
