"""The proofs of a plan, C1 to C14, and the code of everything that planning refuses.

P1 coverage and shapes. P2 splits and alignment. P3 flow and mesh: the plan would compute wrongly,
or not at all. P4 unclear: the plan says something twice, in vain or in words that nobody knows, or
exceeds a limit; it might compute rightly.
"""

from __future__ import annotations

CODES: dict[str, str] = {
    "P101": "a parameter has no rule",
    "P102": "the checkpoint lacks a tensor that config.json implies",
    "P103": "a tensor has a dtype that tpx does not read",
    "P104": "a tensor's shape is not the one that config.json gives it",
    "P105": "the checkpoint has a tensor that config.json does not imply",
    "P106": "the checkpoint stores experts in another form than config.json says",
    "P107": "tensors of one parameter have different dtypes",
    "P108": "the pieces of a tensor leave a gap or overlap",
    "P109": "the plan is for another model",
    "P201": "query or key heads do not divide over tp",
    "P202": "a rank would hold no row of the vocabulary",
    "P203": "a cut falls inside a block of quantised values",
    "P204": "the ranks' shards of a parameter leave a gap or overlap",
    "P205": "a shard's ranges are not one range of its logical dimension",
    "P301": "parameters that share a dimension are not cut alike",
    "P302": "an expert axis of the mesh cuts no expert",
    "P303": "a mesh axis has no rank",
    "P304": "the two views of the mesh have different sizes",
    "P305": "etp does not divide tp",
    "P306": "an expert group neither lies in a tp group nor is made of whole ones",
    "P307": "a dispatch adds sums of different tokens",
    "P308": "the plan is for another number of ranks",
    "P309": "a partial sum is added never, twice or over the wrong ranks",
    "P310": "a bias is added never, or more than once",
    "P311": "values that meet are not cut alike",
    "P312": "values that meet are of different tokens",
    "P313": "a value must be whole and is cut",
    "P314": "a rank's query heads are not the groups of its key heads",
    "P315": "tied parameters are not cut alike",
    "P316": "a collective belongs to no step of the forward",
    "P317": "ranks call different collectives",
    "P318": "the mesh's groups do not divide the ranks evenly",
    "P401": "a word that nobody knows",
    "P402": "a rule matches nothing",
    "P403": "a rule or a key stands there twice",
    "P404": "a style cuts nothing of what its rule matches",
    "P405": "parameters that share a dimension differ, over an axis of one rank",
    "P406": "a dispatch has nothing to do on this mesh",
    "P407": "unequal parts that the rule does not accept",
    "P408": "rules for the experts differ",
    "P409": "a value of the wrong kind",
    "P410": "a key is missing",
    "P411": "text that is no plan",
    "P412": "a file that is missing or cannot be read",
    "P413": "an option that does not belong to its style",
    "P414": "a rank would hold more than the memory limit",
    "P415": "a larger share stays whole on every rank than the limit allows",
    "P416": "a limit that the model cannot reach",
    "P417": "etp does not divide tp, which dispatch gather alone could do without",
    "P418": "experts do not divide over ep, so ranks would hold unequal numbers",
    "P419": "more ranks than a plan may have",
}

# What each proof states when it holds, and the codes that it is refused with.
PROOFS: dict[str, tuple[str, ...]] = {
    "C1": ("P101", "P403", "P105"),
    "C2": ("P402", "P404", "P408", "P413"),
    "C3": ("P102", "P103", "P104", "P106", "P107", "P108", "P109"),
    "C4": ("P204",),
    "C5": ("P203", "P205", "P407"),
    "C6": ("P201", "P202", "P418"),
    "C7": ("P314",),
    "C8": ("P301", "P302", "P307", "P309", "P310", "P311", "P312", "P313", "P405", "P406"),
    "C9": ("P303", "P304", "P305", "P306", "P308", "P318", "P417", "P419"),
    "C10": ("P315",),
    "C11": ("P415",),
    "C12": ("P414", "P416"),
    "C13": ("P316",),
    "C14": ("P317",),
}
# Refused while the file is read, before there is anything to prove.
READING = ("P401", "P409", "P410", "P411", "P412")
