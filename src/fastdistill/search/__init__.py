"Which recipe is best: candidates, runs, results."
