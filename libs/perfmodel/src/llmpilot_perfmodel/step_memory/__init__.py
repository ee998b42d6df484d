"""What one step of an inference server needs of a GPU's memory at its peak, tensor by tensor."""
