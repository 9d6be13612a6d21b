"""Many runs: jobs that can be left alone, searches, reports."""
