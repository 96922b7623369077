"""``hybridfl report``: stored runs as one page of HTML that needs no network.

In two steps: collect what there is to show as plain containers (``content.py``, a module for each section), and put it into the
page (``page.py``). The page computes nothing but places on the screen: its numbers are those of ``hybridfl compare``.
"""
