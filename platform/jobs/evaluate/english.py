"""The words of recall prompts in English."""

THINGS = (
    "anchor", "basket", "candle", "drum", "engine", "fence", "garden", "hammer", "island", "jacket",
    "kettle", "ladder", "mirror", "needle", "orchard", "piano", "quarry", "ribbon", "saddle",
    "tunnel", "umbrella", "violin", "wagon", "yacht", "zebra", "bridge", "castle", "desert",
    "feather", "glove", "harbour", "lantern", "market", "network", "oven", "palace", "rocket",
    "stable", "tower", "valley", "window", "chimney",
)  # fmt: skip
SENTENCES = (
    " The road bends twice before it meets the river.",
    " Rain fell in the morning and stopped after lunch.",
    " A dog slept on the steps of the old post office.",
    " They painted the door green and left it open to dry.",
    " Nobody had opened the upper shutters for years.",
    " The train was late, so we walked along the canal.",
    " Bread is cheaper on the other side of the square.",
    " Snow lay on the roofs until the end of April.",
    " The clock above the station runs four minutes fast.",
    " He folded the map and put it back in the drawer.",
    " Two boats came in with the tide and one went out.",
    " She planted beans where the shed used to stand.",
)
DIGITS = 5
"""Of a code: the answer to a question."""
