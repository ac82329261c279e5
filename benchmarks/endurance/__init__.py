"""What is repeated very often to find what fails rarely: `python -m benchmarks.endurance`."""
