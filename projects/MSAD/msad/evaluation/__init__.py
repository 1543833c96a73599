"""What detectors cost and what they reach."""
