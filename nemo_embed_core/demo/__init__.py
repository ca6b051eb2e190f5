"""The whole path on data that is on every machine (launch/demo.py): its texts and its stages."""
