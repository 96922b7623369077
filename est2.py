import numpy as np
rng=np.random.default_rng(1)
M=1000000; v=.1; vG=.005
for n in (10,20,30,50):
  out=[]
  for d in (0,.2,.3,.5,.7,1.,1.5,3.):
    vh=v*rng.chisquare(n-1,M)/(n-1)
    L=rng.normal(0,np.sqrt(v),M); G=d+rng.normal(0,np.sqrt(vG),M)
    for vGh in (vG,vh/20):
        mom=vh/np.maximum((L-G)**2,vh+vGh)
        out.append(round(float((((1-mom)*L+mom*G)**2).mean()/v),3))
  print(n,out[::2],out[1::2])
