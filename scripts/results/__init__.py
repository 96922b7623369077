"""Tables, plots and verdicts of the presets that make a study, for the targets ``make table-…``."""
