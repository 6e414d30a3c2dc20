"""`autopipeline bench`: how long things take here, and how much of what the machine can do."""
