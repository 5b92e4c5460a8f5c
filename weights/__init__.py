"""Published weights, their conversion into model folders, and export to other runtimes."""

ANY_SIZE = ("NAT", "DiNAT", "DiNAT_s", "OverLoCK", "CARE", "VAN")  # families that export with dynamic height and width
