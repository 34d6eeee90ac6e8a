"""Runs sagas over the log: dispatches commands, undoes, recovers after a crash."""
