"What every other package builds on: outputs, errors, tasks, classes, random numbers, processes."
