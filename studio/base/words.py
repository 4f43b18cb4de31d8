"""Word lists that the pretraining domains and the ticket data share.

The base must know the words of a ticket (its embeddings stay frozen under LoRA), but it never sees a ticket, nor a
record made from one: the lists meet the base in other sentences, other records and other tasks.
"""

SITES: tuple[str, ...] = (
    "Norwick", "Eastford", "Halden", "Quayside", "Brackley", "Ironbridge", "Millbrook", "Stonegate", "Redcliff",
    "Ashdown", "Kelmore", "Tarvin", "Westhaven", "Lindholm", "Oakmere", "Pendle", "Ravensby", "Silverton", "Thornbury",
    "Umberley", "Varley", "Wexcombe", "Yarrow", "Zelby", "Danforth", "Castleton", "Fairlight", "Greystone", "Hollins",
    "Jarrow", "Marlow", "Newport",
)  # fmt: skip

EQUIPMENT: dict[str, str] = {
    "PMP": "pump",
    "VLV": "valve",
    "CNV": "conveyor",
    "FAN": "fan",
    "MTR": "motor",
    "CMP": "compressor",
    "GEN": "generator",
    "BLR": "boiler",
    "LFT": "lift",
    "TNK": "tank",
    "CHL": "chiller",
    "MIX": "mixer",
}

PEOPLE: tuple[str, ...] = (
    "Anna", "Boris", "Carla", "David", "Elena", "Frank", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis", "Maria",
    "Nils", "Olga", "Peter", "Rosa", "Simon", "Tessa", "Viktor",
)  # fmt: skip

PARTS: tuple[str, ...] = (
    "bearing", "belt", "seal", "filter", "hose", "cable", "switch", "sensor", "fuse", "gasket", "blade", "screw",
    "pipe", "gear", "relay", "panel", "shaft", "bracket", "casing", "plug", "nozzle", "strainer", "breaker", "guard",
)  # fmt: skip

LIQUIDS: tuple[str, ...] = ("oil", "water", "coolant", "fluid", "grease", "steam", "fuel")

FAULTS: dict[str, tuple[str, ...]] = {
    "leak": (
        "is leaking {liquid}", "drips {liquid} on the floor", "loses {liquid} at the {part}", "sprays {liquid}",
        "has a puddle of {liquid} under it", "is seeping {liquid} from the {part}",
    ),
    "noise": (
        "makes a loud grinding noise", "squeals when it starts", "is rattling", "hums loudly", "knocks at full speed",
        "is very noisy",
    ),
    "overheating": (
        "is running hot", "is too hot to touch", "shows a temperature far above normal", "smells of burning",
        "gets hot after an hour", "is smoking",
    ),
    "electrical": (
        "trips the breaker", "keeps blowing the fuse", "is sparking at the {part}", "has no power",
        "gives small shocks", "goes dead without warning",
    ),
    "blockage": (
        "is blocked", "is clogged with dust", "has a jammed {part}", "lets nothing through", "is stuck halfway",
        "is full of dirt",
    ),
    "wear": (
        "has a worn {part}", "has a cracked {part}", "has a frayed belt", "has a loose {part}",
        "has rust on the {part}", "has a broken {part}",
    ),
    "vibration": (
        "is shaking", "vibrates at high speed", "wobbles on its base", "trembles under load", "shakes the whole floor",
        "is vibrating badly",
    ),
}  # fmt: skip
"""What a machine does, by class of fault. The base reads the phrases in work reports; the classes are the tickets'."""

URGENCIES: dict[str, tuple[str, ...]] = {
    "low": (
        "No hurry.", "It can wait until the next service.", "Do it when there is time.", "This is not urgent.",
        "Any day this month is fine.",
    ),
    "medium": (
        "Please fix it this week.", "Plan it for the coming days.", "It still works for now.",
        "It should be done before the weekend.", "We can manage until then.",
    ),
    "high": (
        "Please come today.", "We are losing output.", "We need it tonight.", "The line is slow because of it.",
        "It cannot wait until tomorrow.",
    ),
    "critical": (
        "Production has stopped.", "People are in danger.", "The line is down.", "This is an emergency.",
        "Come at once.",
    ),
}  # fmt: skip
"""How soon somebody is needed, by priority. Shared with the base in the same way."""

TIMES: tuple[str, ...] = (
    "today", "tonight", "this morning", "this week", "next week", "at the next service", "now", "immediately",
    "at once", "soon", "within a day", "before the weekend", "when convenient", "when there is time", "next month",
)  # fmt: skip

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
