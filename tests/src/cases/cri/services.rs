//! Real services in pods, used from their own pod and from another one over the pods' network.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Result, ensure};

use super::{FOREVER, run_pod};
use crate::context::{Context, DEBIAN};
use crate::cri::{Container, ContainerSpec, Pod};
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("services: redis answers its own benchmark, from its pod and from another", redis)
        .with_pods()
        .with_services(),
    Case::any("services: nginx serves pages and large files whole, to many at once", nginx).with_pods().with_services(),
    Case::any("services: python3 has its processes, threads, database and event loop", python)
        .with_pods()
        .with_services(),
];

/// Two pods, of which one is to serve: both, the address of that one, and the other's only container.
fn pair(context: &Context, run: impl FnOnce(&Pod<'_>, &str, &Container<'_>) -> Result<()>) -> Result<()> {
    let (serving, other) = (run_pod(context, "service")?, run_pod(context, "client")?);
    let client = other.run(ContainerSpec::new("client", DEBIAN, FOREVER))?;
    run(&serving, &serving.address()?, &client)?;
    other.remove()?;
    serving.remove()
}

fn redis(context: &Context) -> Result<()> {
    pair(context, |pod, address, client| {
        let program = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"];
        let server = pod.run(ContainerSpec::new("redis", DEBIAN, &program))?;
        let ready = |host: &str| format!("until redis-cli -h {host} ping 2>/dev/null | grep -q PONG; do :; done");
        let benchmark = |host: &str| format!("redis-benchmark -h {host} -q -n 1000 -c 20 -P 4 -t set,get,incr,lpush");
        for (container, host) in [(&server, "127.0.0.1"), (client, address)] {
            container.shell(&ready(host))?;
            let text = container.shell(&benchmark(host))?;
            let measured = text.matches("requests per second").count();
            ensure!(measured >= 4 && !text.contains("Error"), "{text}");
        }
        client.shell(&format!("redis-cli -h {address} set key value"))?;
        ensure!(server.shell("redis-cli get key")? == "value\n");
        Ok(())
    })
}

/// Eight at a time fetch the page, and the large file, and say how many bytes of which hash they got.
const FETCH: &str = "
import concurrent.futures, hashlib, sys, urllib.request
def fetch(name):
    body = urllib.request.urlopen(f'http://{sys.argv[1]}/{name}', timeout=300).read()
    return name, len(body), hashlib.sha256(body).hexdigest()
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    got = list(pool.map(fetch, ['large'] * 2 + ['page'] * 100))
for line in sorted(set(got)):
    print(*line)
print(len(got))
";

fn nginx(context: &Context) -> Result<()> {
    pair(context, |pod, address, client| {
        let program =
            "cd /var/www/html; echo page > page; head -c 4194304 /dev/urandom > large; exec nginx -g 'daemon off;'";
        let server = pod.run(ContainerSpec::new("nginx", DEBIAN, &["sh", "-c", program]))?;
        let up = "import sys, urllib.request; urllib.request.urlopen(f'http://{sys.argv[1]}/page')";
        client.shell(&format!("until python3 -c \"{up}\" {address} 2> /dev/null; do :; done"))?;
        let fetched = client.exec(&["python3", "-c", FETCH, address], 0)?;
        let (told, errors) = (String::from_utf8_lossy(&fetched.stdout), String::from_utf8_lossy(&fetched.stderr));
        let sums = server.shell("cd /var/www/html; for name in large page; do sha256sum < $name; done")?;
        let sums: Vec<&str> = sums.lines().filter_map(|line| line.split(' ').next()).collect();
        ensure!(sums.len() == 2, "{sums:?}");
        ensure!(told == format!("large 4194304 {}\npage 5 {}\n102\n", sums[0], sums[1]), "{told}{errors}");
        // The node reaches it as well.
        let mut stream = TcpStream::connect((address, 80))?;
        stream.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("page\n"), "{answer}");
        Ok(())
    })
}

/// What an interpreter uses of a system: processes and their pipes, threads, files that are locked and mapped, and sockets.
const SMOKE: &str = "
import asyncio, concurrent.futures, hashlib, mmap, multiprocessing, sqlite3, subprocess, tempfile, threading
def square(number):
    return number * number
with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context('fork')) as pool:
    assert sum(pool.map(square, range(100), chunksize=10)) == 328350
lock, counted = threading.Lock(), [0]
def count():
    for _ in range(1000):
        with lock:
            counted[0] += 1
threads = [threading.Thread(target=count) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert counted == [8000]
with tempfile.TemporaryDirectory() as directory:
    database = sqlite3.connect(directory + '/database')
    database.execute('create table numbers (number)')
    with database:
        database.executemany('insert into numbers values (?)', [(number,) for number in range(10000)])
    assert database.execute('select sum(number) from numbers').fetchone() == (49995000,)
    with open(directory + '/mapped', 'w+b') as file:
        file.truncate(1 << 20)
        with mmap.mmap(file.fileno(), 0) as memory:
            memory[:5] = b'hello'
        assert file.read(5) == b'hello'
assert subprocess.run(['sha256sum'], input=b'x' * 1000000, capture_output=True).stdout.split()[0].decode() \\
    == hashlib.sha256(b'x' * 1000000).hexdigest()
async def echo():
    async def serve(reader, writer):
        writer.write(await reader.readexactly(100000))
        await writer.drain()
        writer.close()
    server = await asyncio.start_server(serve, '127.0.0.1', 0)
    async def ask():
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b'y' * 100000)
        return await reader.read()
    async with server:
        assert await asyncio.gather(*(ask() for _ in range(20))) == [b'y' * 100000] * 20
asyncio.run(echo())
print('all well')
";

/// Serves one connection: sends back what it reads.
const ECHO: &str = "
import socket
with socket.create_server(('', 7000)) as server:
    print('ready', flush=True)
    connection, _ = server.accept()
    with connection:
        while chunk := connection.recv(65536):
            connection.sendall(chunk)
";

const ASK: &str = "
import random, socket, sys, threading
sent = random.Random(7).randbytes(4 << 20)
for attempt in range(1000000):
    try:
        connection = socket.create_connection((sys.argv[1], 7000))
        break
    except ConnectionRefusedError:
        pass
def send():
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
got = b''.join(iter(lambda: connection.recv(65536), b''))
print(got == sent, len(got))
";

fn python(context: &Context) -> Result<()> {
    pair(context, |pod, address, client| {
        let said = client.exec(&["python3", "-c", SMOKE], 0)?;
        let errors = String::from_utf8_lossy(&said.stderr);
        ensure!(said.stdout == b"all well\n" && said.exit_code == 0, "{errors}");
        let server = pod.run(ContainerSpec::new("echo", DEBIAN, &["python3", "-c", ECHO]))?;
        let asked = client.exec(&["python3", "-c", ASK, address], 0)?;
        let (told, errors) = (String::from_utf8_lossy(&asked.stdout), String::from_utf8_lossy(&asked.stderr));
        ensure!(told == "True 4194304\n", "{told}{errors}");
        ensure!(server.ended()?.exit_code == 0);
        Ok(())
    })
}
