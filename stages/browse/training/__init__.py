"""Pages of trainings, samplings and evaluations."""
