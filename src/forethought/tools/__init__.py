"""One file for each outside system; nothing else imports that system."""
