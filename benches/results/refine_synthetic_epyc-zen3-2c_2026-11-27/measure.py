"""Refinement with public prompts of half of the structures, and with prompts of the LLM beside them."""
import json, os, random, subprocess, sys, time
R=sys.argv[1]  # the directory of a seed of `gradtx demo --world held-out`
G='gradtx'
os.makedirs('syn', exist_ok=True)
random.seed(1)
test=[json.loads(l) for l in open(R+'/world/test/tasks.jsonl')]
used={tuple(t['question'].split()[-4:]) for t in test} if 'question' in test[0] else set()
S=['<copy>','<rev>','<rotl>','<rotr>','<swap>','<half>']
def data(path,structs,n=2000):
    with open(path,'w') as f:
        k=0
        while k<n:
            l=[random.choice('abcdefghij') for _ in range(4)]
            if tuple(l) in used: continue
            f.write(json.dumps({"task":"public","question":f"{random.choice(structs)} ? ? {' '.join(l)}","answer":f"= {' '.join(l)} ;"})+'\n'); k+=1
data('syn/all.jsonl',S); data('syn/half.jsonl',S[:3])
def run(*a):
    r=subprocess.run([G,*a],capture_output=True,text=True)
    if r.returncode: print(r.stdout[-300:],r.stderr[-600:])
    return r
res=[]
for name,fold,shadow in [('+5 !x;',4,17),('+5 =x;',2,33),('+5 (x);',2,14)]:
    home=f"{R}/run/cross-validation/fold-{fold}/shadow-{shadow:05d}"
    t=[x for x in test if x['task']==name][:100]
    tf=f'syn/test-{shadow}.jsonl'; open(tf,'w').write('\n'.join(map(json.dumps,t))+'\n')
    for label,pub,more in [('all','all',[]),('half','half',[]),('half+synthetic','half',['--set','refine.synthetic_prompts=384'])]:
        out=f'syn/{shadow}-{label}'; t0=time.time()
        base=['--run','syn/run','--config',R+'/world/settings.toml','--threads','1','--set',f'data.public={os.getcwd()}/syn/{pub}.jsonl',*more]
        run('refine',*base,f'{home}/finetuned/tiny/update.safetensors','--translated',f'{home}/translated/products','--out',out)
        run('evaluate',*base,'--data',tf,'--adapter',out+'/adapter','--out',out+'-e')
        r=json.load(open(out+'/refinement.json')); s=json.load(open(out+'-e/score.json'))
        o={"client":name,"public":label,"exact_match":s['score'],"examples":s['examples'],"rounds":r['rounds'],"prompts":r['prompts'],"synthetic":r.get('synthetic')}
        res.append(o); print(json.dumps(o),round(time.time()-t0,1),flush=True)
json.dump(res,open('syn/result.json','w'),indent=1)
