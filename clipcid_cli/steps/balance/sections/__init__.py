"""Parts of the report, and what is computed for them."""
