"""Contains transformers' fp32 results for PROMPT with the demo's weights (Gemma 3 270M): the ten
most likely next tokens with their probabilities, and the greedy continuation."""

PROMPT = "I want to move"
TOP_TEN = {
    " to": 0.1956, " my": 0.1689, " the": 0.1013, " a": 0.0812, " from": 0.0644, " this": 0.0447,
    " forward": 0.0267, " your": 0.0244, " some": 0.0217, " away": 0.0183,
}  # fmt: skip
CONTINUATION = (
    " to a new country, but I don't know how to get there. I'm a 20-year-old college student who"
)
