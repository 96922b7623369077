import numpy as np
rng=np.random.default_rng(0)
M=400000; v=.1; vG=.005
for known in (True, False):
  for d in (0,.2,.3,.5,.7,1.,1.5,3.):
    n=10
    x=rng.normal(0,np.sqrt(v*n),(M,n)); L=x.mean(1); G=d+rng.normal(0,np.sqrt(vG),M)
    vh=v if known else x.var(1,ddof=1)/n
    raw=np.minimum(1,vh/(L-G)**2); mom=vh/np.maximum((L-G)**2,vh+vG)
    f=lambda a:(((1-a)*L+a*G)**2).mean()/v
    print(known,d,round(f(raw),3),round(f(mom),3))
K=20;n=10
for t2 in (0,.02,.1,.5,2):
    M=20000
    mu=rng.normal(0,np.sqrt(t2),(M,K)); L=mu+rng.normal(0,np.sqrt(.1),(M,K)); vh=.1*rng.chisquare(n-1,(M,K))/(n-1)
    def risk(a,G): return ((((1-a)*L+a*G)-mu)**2).mean()/.1
    G=(L.sum(1,keepdims=True)-L)/(K-1)
    for name,vv in (("known",np.full((M,K),.1)),("est",vh),("est-pooledv",np.repeat(vh.mean(1,keepdims=True),K,1))):
        t=np.maximum(0,L.var(1,ddof=1,keepdims=True)-vv.mean(1,keepdims=True))
        vGi=(vv.sum(1,keepdims=True)-vv)/(K-1)**2
        pooled=vv/(vv+vGi+t*(1+1/(K-1)))
        spec=vv/(vv+vv/(K-1)+t*(1+1/(K-1)))
        mom=vv/np.maximum((L-G)**2,vv+vGi)
        print(t2,name,"pooled",round(risk(pooled,G),3),"spec",round(risk(spec,G),3),"moment",round(risk(mom,G),3),"global",round(risk(1,G),3))
