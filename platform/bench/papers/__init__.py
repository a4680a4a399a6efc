"""Whole models at the papers' shapes, untrained, beside full attention; each module is a bench."""
