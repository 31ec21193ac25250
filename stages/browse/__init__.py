"""`pipeline browse`: a local, read-only web application about runs, stores, trainings, samplings and evaluations."""
