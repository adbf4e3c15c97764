"""A module and its gradients: what people, optimizers and DDP do to them."""
