import subprocess, sys, pathlib
file, test, *_ = sys.argv[1:]
muts = [l.rstrip("\n").split(" => ") for l in open(sys.argv[3]) if l.strip()]
p = pathlib.Path(file); orig = p.read_text()
try:
    for a, b in muts:
        if orig.count(a) < 1: print("ABSENT", a); continue
        p.write_text(orig.replace(a, b, 1))
        r = subprocess.run([sys.executable,"-m","pytest","-q","-x","-p","no:xdist",*test.split(",")],capture_output=True,text=True)
        print("killed " if r.returncode in (1,2) else f"SURVIVED({r.returncode})", "|", a, "=>", b)
finally:
    p.write_text(orig)
