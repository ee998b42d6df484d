"""An inference server without a GPU: the performance model behind real protocols, in real time."""
