"""Function-preserving rescales: methods, plans, applying and proving them."""
