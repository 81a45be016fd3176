"""Pure schedulers: queues and pools in, batches out. No tensors, no clocks, no sockets."""
