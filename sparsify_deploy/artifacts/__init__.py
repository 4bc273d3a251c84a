"""What was made, from what, on which machine: fingerprints, environment facts and the artifact store."""
