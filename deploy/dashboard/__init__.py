"""The page of a run: reads the files in the run's folder, so that it is the same for live, finished and copied runs."""
