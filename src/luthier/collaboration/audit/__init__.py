"""Audits: attacks on the bytes that are about to be sent, by someone who knows the true rows."""
