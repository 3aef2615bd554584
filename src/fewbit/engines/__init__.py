"""Other engines: what they take of what fewbit writes."""
