"""The whole model beside its rivals: cases, providers, the judge, the race.

May import: everything in gemma_fast but cli.
"""
