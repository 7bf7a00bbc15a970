"""Names of the files that steps write for the next one."""

MANIFEST = "capture.json"
FIT_FILE = "fit.json"
SCORES_FILE = "scores.safetensors"
FRONTIER_FILE = "frontier.json"
CALIBRATE_FILE = "calibrate.json"
ATTEMPTS_FILE = "attempts.json"
LOSSES_FOLDER = "certificate"
