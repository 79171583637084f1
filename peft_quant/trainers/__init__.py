"""Trainers and training reports."""
