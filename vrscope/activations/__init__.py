"""What flows through a running model: the inputs and outputs of its linear layers, and their statistics."""
