"""What computes logits for the endpoint, behind one interface, and the scheduler that shares it between requests."""
