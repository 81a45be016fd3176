"""The paged KV cache: `pool` and `tickets` know ids, `store` holds tensors."""
