"""Many runs: jobs of a sweep, searches, and reports of their results."""
