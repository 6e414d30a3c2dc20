"""`python -m autopipeline`."""

from autopipeline.cli import main

main()
