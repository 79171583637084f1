"""Trainers, and what they report."""
