"""Search for the best recipe: candidates, runs, results."""
