"""The stateful interface that scripts and training loops are written for: one shell around every scheduler."""
