"Code that all other packages use: outputs, errors, tasks, classes, random numbers, processes."
