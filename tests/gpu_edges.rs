//! GPU pools where things end, run out or are asked for wrongly, on the simulated device: each says what is wrong,
//! loses nothing and is usable after.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use memory_pool::base::error::Refusal;
use memory_pool::gpu::{SimMemory, Touch};
use memory_pool::{
    AllocatorType, DevicePool, Error, GpuDevice, PinnedPool, PoolConfig, SimConfig, Strategy, Stream,
};

const MIB: usize = 1 << 20;

fn device(seed: u64, memory: usize) -> GpuDevice {
    GpuDevice::simulated(SimConfig::default().seed(seed).eagerness(0).memory(memory))
}

fn clean(gpu: &GpuDevice) {
    let sim = gpu.simulation().unwrap();
    sim.run_all();
    assert!(sim.hazards().is_empty(), "{}", sim.hazards()[0]);
}

/// Work that writes a block and takes its time.
fn busy(gpu: &GpuDevice, stream: &Stream, at: usize, bytes: usize) {
    gpu.simulation().unwrap().launch(stream, 1_000_000, &[Touch::write(at, bytes)], |_| ()).unwrap();
}

/// What is freed but in use is waited for, then idle memory in the wrong places is given back, here and in other
/// pools; only then the callback is asked, and the error says who holds what.
#[test]
fn memory_is_sought_in_the_order_of_what_it_costs() {
    let gpu = device(1, 64 * MIB);
    let (a, b) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
    let config = PoolConfig::default_gpu().max_size(24 * MIB);
    let pool = DevicePool::new(&gpu, config.clone()).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    pool.set_oom_callback(move |layout| {
        assert!(layout.size() >= 16 * MIB);
        count.fetch_add(1, Ordering::Relaxed);
        false
    });

    // Other streams: one wait on the device and no call for memory.
    let block = pool.alloc_uninit::<u8>(16 * MIB, &a).unwrap();
    busy(&gpu, &a, block.as_device_ptr() as usize, 16 * MIB);
    drop(block);
    let before = pool.stats().source_calls;
    let block = pool.alloc_uninit::<u8>(16 * MIB, &b).unwrap();
    assert_eq!(pool.stats().source_calls, before, "taken from the other stream");
    busy(&gpu, &b, block.as_device_ptr() as usize, 16 * MIB);

    // Deferred frees: memory for the CPU cannot be ordered behind a stream, so its work is waited for.
    let pinned = PinnedPool::new(&gpu, config.clone().max_size(16 * MIB)).unwrap();
    pinned.set_oom_callback(|_| panic!("nothing is short"));
    let mut target = pool.alloc_uninit::<u8>(MIB, &a).map(|buffer| {
        // SAFETY: bytes are valid whatever they are.
        unsafe { buffer.assume_init() }
    });
    let host = pinned.alloc::<u8>(MIB).unwrap();
    drop(target.as_mut().unwrap().copy_from_pinned(host, &a).unwrap());
    drop(pinned.alloc::<u8>(16 * MIB).unwrap());
    drop((target, block));

    // Idle memory of this pool, in pieces too small.
    gpu.synchronize().unwrap();
    let parts: Vec<_> = (0..12).map(|_| pool.alloc_uninit::<u8>(2 * MIB, &a).unwrap()).collect();
    drop(parts);
    gpu.synchronize().unwrap();
    drop(pool.alloc_uninit::<u8>(24 * MIB, &b).unwrap());

    // Idle memory of another pool of the device.
    let other = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    drop(other.alloc_uninit::<u8>(36 * MIB, &a).unwrap());
    gpu.synchronize().unwrap();
    pool.trim(0).unwrap();
    drop(pool.alloc_uninit::<u8>(24 * MIB, &b).unwrap());
    let held = other.alloc_uninit::<u8>(16 * MIB, &a).unwrap();
    gpu.synchronize().unwrap();
    pool.trim(0).unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 0, "the callback is asked last");

    // Nothing is left: the callback, then an error that says who holds what.
    let most = other.alloc_uninit::<u8>(32 * MIB, &a).unwrap();
    let live = pool.alloc_uninit::<u8>(2 * MIB, &a).unwrap();
    let error = pool.alloc_uninit::<u8>(20 * MIB, &a).unwrap_err();
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    let text = error.to_string();
    assert!(matches!(error, Error::OutOfMemory { requested, .. } if requested >= 20 * MIB), "{text}");
    assert!(text.contains(&(2 * MIB).to_string()) && text.contains("live"), "{text}");
    drop((held, most, live));
    drop(pool.alloc_uninit::<u8>(20 * MIB, &a).unwrap());
    pool.check().unwrap();
    clean(&gpu);
}

/// Raw blocks outlive the stream that they were allocated for, with work of it in flight.
#[test]
fn streams_end_while_blocks_are_out() {
    for seed in 0..20 {
        let gpu = device(seed, 64 * MIB);
        let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(8 * MIB)).unwrap();
        let stays = gpu.new_stream().unwrap();
        for round in 0..10 {
            let goes = gpu.new_stream().unwrap();
            let out = pool.allocate_async(2 * MIB, &goes).unwrap();
            let freed = pool.allocate_async(2 * MIB, &goes).unwrap();
            busy(&gpu, &goes, out.as_ptr() as usize, 2 * MIB);
            busy(&gpu, &goes, freed.as_ptr() as usize, 2 * MIB);
            stays.wait_for(&goes).unwrap();
            // SAFETY: live, and all work on both is ordered before the free.
            unsafe {
                pool.try_deallocate_async(freed, &goes).unwrap();
                drop(goes);
                busy(&gpu, &stays, out.as_ptr() as usize, 2 * MIB);
                pool.try_deallocate_async(out, &stays).unwrap();
            }
            let next = gpu.new_stream().unwrap();
            let whole = pool.alloc_uninit::<u8>(8 * MIB, &next).unwrap();
            busy(&gpu, &next, whole.as_device_ptr() as usize, 8 * MIB);
            pool.check().unwrap_or_else(|error| panic!("seed {seed}, round {round}: {error}"));
        }
        assert!(!pool.has_leaks());
        gpu.synchronize().unwrap();
        pool.trim(0).unwrap();
        assert_eq!(pool.pool_size(), 0);
        clean(&gpu);
    }
}

/// The books of streams that ended serve those that come later: a search looks at all there ever were at once.
#[test]
fn streams_that_come_and_go_leave_no_books_behind() {
    let gpu = device(3, 256 * MIB);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let turns = |number: usize| {
        for turn in 0..number {
            let stream = gpu.new_stream().unwrap();
            let block = pool.allocate_async(2 * MIB, &stream).unwrap();
            busy(&gpu, &stream, block.as_ptr() as usize, 2 * MIB);
            // SAFETY: all work on it was issued to the stream.
            unsafe { pool.deallocate_async(block, &stream) };
            if turn % 16 == 0 {
                clean(&gpu);
            }
        }
        clean(&gpu);
        pool.metadata_size()
    };
    let books = turns(200);
    assert!(turns(3000) < books + (64 << 10), "{books} bytes before");
    pool.check().unwrap();
}

#[test]
fn default_streams_order_memory_as_others_do() {
    let gpu = device(3, 64 * MIB);
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu().max_size(4 * MIB)).unwrap();
    let (legacy, mine, other) = (gpu.default_stream(), gpu.per_thread_stream(), gpu.new_stream().unwrap());
    assert!(legacy.same(&gpu.default_stream()) && mine.same(&gpu.per_thread_stream()));
    assert!(!legacy.same(&mine));
    for stream in [&legacy, &mine, &other, &mine, &legacy] {
        let block = pool.alloc_uninit::<u8>(4 * MIB, stream).unwrap();
        busy(&gpu, stream, block.as_device_ptr() as usize, 4 * MIB);
    }
    // The default stream of a thread is that thread's alone.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(!mine.same(&gpu.per_thread_stream()));
            for error in [
                pool.alloc_uninit::<u8>(1, &mine).unwrap_err(),
                mine.synchronize().unwrap_err(),
                other.wait_for(&mine).unwrap_err(),
            ] {
                assert!(error.to_string().contains("another thread"), "{error}");
            }
        });
    });
    let kept = pool.alloc_uninit::<u8>(MIB, &mine).unwrap();
    busy(&gpu, &mine, kept.as_device_ptr() as usize, MIB);
    let (address, bytes) = (kept.as_device_ptr(), kept.len());
    std::thread::scope(|scope| _ = scope.spawn(|| drop(kept)).join());
    pool.check().unwrap();
    // Freed by a thread that cannot name its stream, it is reused here or when the device is idle.
    gpu.synchronize().unwrap();
    let all = pool.alloc_uninit::<u8>(4 * MIB, &mine).unwrap();
    assert!((all.as_device_ptr()..all.as_device_ptr() + 4 * MIB as u64).contains(&address), "{bytes}");
    drop(all);
    clean(&gpu);
}

#[test]
fn what_would_invalidate_a_capture_is_refused() {
    let gpu = device(4, 64 * MIB);
    let (stream, other) = (gpu.new_stream().unwrap(), gpu.new_stream().unwrap());
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut buffer = pool.alloc::<u8>(1000, &other).unwrap();
    let empty = other.begin_capture().unwrap().end().unwrap();
    let capture = stream.begin_capture().unwrap();
    let event = stream.record_event().unwrap();
    let (mut into, host) = ([0u8; 1000], pinned.alloc::<u8>(1000).unwrap());
    let refused = [
        stream.synchronize().unwrap_err(),
        stream.is_idle().unwrap_err(),
        stream.begin_capture().unwrap_err(),
        stream.scope(|_| Ok(())).unwrap_err(),
        event.synchronize().unwrap_err(),
        event.is_done().unwrap_err(),
        empty.launch(&stream).unwrap_err(),
        buffer.copy_to_host(&mut into, &stream).unwrap_err(),
        buffer.copy_from_host(&into, &stream).unwrap_err(),
        buffer.copy_from_pinned(host, &stream).unwrap_err(),
        pool.alloc_from_host(&into, &stream).unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error, Error::InvalidOperation(Refusal::Capturing), "{error}");
    }
    // None of it broke the capture.
    drop(pool.alloc::<u8>(1000, &stream).unwrap());
    let graph = capture.end().unwrap();
    graph.launch(&stream).unwrap();
    drop((graph, buffer, event));
    gpu.synchronize().unwrap();
    assert!(!pool.has_leaks() && !pinned.has_leaks());
    clean(&gpu);
}

#[test]
fn pointers_that_are_no_blocks_are_told_apart() {
    let gpu = device(5, 64 * MIB);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let other = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let block = pool.allocate_async(4096, &stream).unwrap();
    let theirs = other.allocate_async(4096, &stream).unwrap();
    let owned = pool.alloc_uninit::<u8>(4096, &stream).unwrap();
    let owned_at = NonNull::new(owned.as_device_ptr() as *mut c_void).unwrap();
    // SAFETY: only addresses are made.
    let inside = unsafe { block.byte_add(512) };
    let nowhere = NonNull::new(64 as *mut c_void).unwrap();
    let cases = [
        (nowhere, "not memory of this pool"),
        (theirs, "not memory of this pool"),
        (NonNull::from(&gpu).cast(), "not memory of this pool"),
        (inside, "inside a block"),
        (owned_at, "belongs to"),
    ];
    for (address, says) in cases {
        // SAFETY: all of them are refused, which is what this shows.
        let error = unsafe { pool.try_deallocate_async(address, &stream) }.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        let error = pool.record_stream(address, &stream).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(pool.usable_size(address.cast()), None);
    }
    // SAFETY: live; the second free is refused.
    unsafe {
        pool.try_deallocate_async(block, &stream).unwrap();
        let twice = pool.try_deallocate_async(block, &stream).unwrap_err();
        assert!(twice.to_string().contains("not a live block"), "{twice}");
        other.try_deallocate_async(theirs, &stream).unwrap();
    }
    drop(owned);
    assert!(!pool.has_leaks() && !other.has_leaks());
    pool.check().unwrap();
}

/// Whatever is leaked stays as it is: nobody else gets its memory, and nothing dangles.
#[test]
fn forgotten_values_are_sound() {
    let gpu = device(6, 256 * MIB);
    let sim = gpu.simulation().unwrap();
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let pinned = PinnedPool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let mut places = Vec::new();
    let mut leak = |at: u64| {
        busy(&gpu, &stream, at as usize, 4096);
        places.push(at);
    };
    let buffer = pool.alloc::<u8>(4096, &stream).unwrap();
    leak(buffer.as_device_ptr());
    std::mem::forget(buffer);
    let source = pool.alloc::<u8>(4096, &stream).unwrap();
    let host = pinned.alloc::<u8>(4096).unwrap();
    let host_at = host.as_ptr() as usize;
    std::mem::forget(source.copy_to_pinned(host, &stream).unwrap());
    std::mem::forget(stream.record_event().unwrap());
    drop(source);
    // A graph for ever keeps what it was captured with.
    let capture = stream.begin_capture().unwrap();
    let inside = pool.alloc::<u8>(4096, &stream).unwrap();
    let inside_at = inside.as_device_ptr();
    drop(inside);
    let graph = capture.end().unwrap();
    graph.launch(&stream).unwrap();
    std::mem::forget(graph);
    // A capture that never ends keeps its stream.
    let lost = gpu.new_stream().unwrap();
    std::mem::forget(lost.begin_capture().unwrap());
    let captured = pool.alloc::<u8>(4096, &lost).unwrap();
    let captured_at = captured.as_device_ptr();
    drop(captured);
    assert!(lost.is_capturing() && lost.synchronize().is_err());
    for _ in 0..200 {
        let fresh = pool.alloc::<u8>(4096, &stream).unwrap();
        let at = fresh.as_device_ptr();
        assert!(!places.contains(&at) && at != inside_at && at != captured_at);
        let mut host = pinned.alloc::<u8>(4096).unwrap();
        assert_ne!(host.as_ptr() as usize, host_at);
        host.fill(1);
    }
    stream.synchronize().unwrap();
    pool.check().unwrap();
    sim.run_all();
    assert!(sim.hazards().is_empty(), "{}", sim.hazards()[0]);
}

/// Runs the test of this name again in a process of its own, where `PLAY` is set.
fn in_a_process(name: &str, variables: &[(&str, &str)]) {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env("PLAY", "1")
        .stdout(std::process::Stdio::null())
        .envs(variables.iter().copied())
        .spawn()
        .unwrap();
    for _ in 0..600 {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{variables:?}: {status}");
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    child.kill().unwrap();
    panic!("{variables:?}: it did not end");
}

/// Every variable reaches the pool, and a mistake in one is named.
#[test]
fn the_environment_configures_gpu_pools() {
    const NAME: &str = "the_environment_configures_gpu_pools";
    if std::env::var_os("PLAY").is_none() {
        let good = [
            ("MEMORY_POOL_GPU_ALLOCATOR_TYPE", "variable_size"),
            ("MEMORY_POOL_GPU_STRATEGY", "first_fit"),
            ("MEMORY_POOL_GPU_INITIAL_SIZE", "4M"),
            ("MEMORY_POOL_GPU_MAX_SIZE", "16M"),
            ("MEMORY_POOL_GPU_ALIGNMENT", "4K"),
            ("MEMORY_POOL_GPU_MIN_BLOCK_SIZE", "64K"),
            ("MEMORY_POOL_GPU_GROWTH_FACTOR", "1.5"),
            ("MEMORY_POOL_GPU_DEVICE_ID", "0"),
            ("MEMORY_POOL_GPU_TRACK_STATS", "true"),
            ("MEMORY_POOL_MAX_SIZE", "1M"),
        ];
        in_a_process(NAME, &good);
        for (variable, value) in [
            ("MEMORY_POOL_GPU_MAX_SIZE", "much"),
            ("MEMORY_POOL_GPU_STRATEGY", "worst_fit"),
            ("MEMORY_POOL_GPU_ALIGNMENT", "3"),
            ("MEMORY_POOL_GPU_GROWTH_FACTOR", "0.5"),
            ("MEMORY_POOL_GPU_DEVICE_ID", "-1"),
        ] {
            in_a_process(NAME, &[(variable, value), ("WRONG", variable)]);
        }
        return;
    }
    let config = PoolConfig::default_gpu().with_env_gpu();
    if let Ok(variable) = std::env::var("WRONG") {
        let text = config.unwrap_err().to_string();
        let field = variable.trim_start_matches("MEMORY_POOL_GPU_").to_lowercase();
        assert!(text.contains(&variable) || text.contains(&field), "{variable}: {text}");
        return;
    }
    let config = config.unwrap();
    assert_eq!(config.allocator_type, AllocatorType::VariableSize);
    assert!(matches!(config.strategy, Strategy::FirstFit));
    assert_eq!((config.min_block_size, config.growth_factor), (64 << 10, 1.5));
    let gpu = device(7, 64 * MIB);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, config).unwrap();
    assert_eq!((pool.pool_size(), pool.max_size()), (4 * MIB, 16 * MIB));
    let blocks: Vec<_> = (0..3).map(|_| pool.alloc_uninit::<u8>(5000, &stream).unwrap()).collect();
    assert!(blocks.iter().all(|block| block.as_device_ptr().is_multiple_of(4096)));
    assert!(pool.alloc_uninit::<u8>(17 * MIB, &stream).unwrap_err().to_string().contains("max_size"));
}

/// What the compiler says to a container in device memory.
#[test]
fn containers_in_device_memory_do_not_compile_and_the_compiler_says_what_to_use() {
    const USE: &str = "use memory_pool::{DevicePool, PinnedPool};";
    let program = |pool: &str| {
        format!("{USE} pub fn make(pool: &{pool}) {{ memory_pool::PoolBox::new_in(1u64, pool).unwrap(); }}")
    };
    let folder = std::env::temp_dir().join(format!("memory-pool-diagnostic-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let here = std::env::current_exe().unwrap();
    let libraries = here.parent().unwrap();
    let compile = |library: &std::path::Path, pool: &str| {
        let source = folder.join("program.rs");
        std::fs::write(&source, program(pool)).unwrap();
        let out = std::process::Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["--edition=2024", "--crate-type=lib", "--emit=metadata", "-o"])
            .arg(folder.join("program.rmeta"))
            .arg("-L")
            .arg(format!("dependency={}", libraries.display()))
            .arg("--extern")
            .arg(format!("memory_pool={}", library.display()))
            .arg(&source)
            .output();
        let out = match out {
            Ok(out) => out,
            Err(error) => return Err(format!("no compiler here: {error}")),
        };
        Ok((out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned()))
    };
    let mut built: Vec<_> = std::fs::read_dir(libraries)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("libmemory_pool-") && name.ends_with(".rlib")
        })
        .collect();
    built.sort_by_key(|path| std::cmp::Reverse(path.metadata().and_then(|data| data.modified()).unwrap()));
    let mut said = Mutex::new(String::new());
    // Of the builds that lie there, the one that a program can be made with.
    let fits = built.iter().find(|library| match compile(library, "PinnedPool") {
        Ok((compiles, text)) => {
            *said.lock().unwrap() = text;
            compiles
        }
        Err(text) => {
            *said.lock().unwrap() = text;
            false
        }
    });
    let said = std::mem::take(said.get_mut().unwrap());
    if said.starts_with("no compiler") {
        return eprintln!("skipped, {said}");
    }
    let library = fits.unwrap_or_else(|| panic!("no build fits: {said}"));
    let (compiles, text) = compile(library, "DevicePool").unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(!compiles);
    for part in ["E0277", "the CPU cannot touch", "DeviceBuffer", "DeviceVec", "PinnedPool"] {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
}

/// Numbers below a limit, always the same ones.
fn random() -> impl FnMut(usize) -> usize {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    move |limit| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % limit
    }
}

/// Requests of sizes up to `largest`, of which any may go next, in steps; at most `most` bytes are live.
fn at_random(pool: &DevicePool, stream: &Stream, most: usize, steps: usize, largest: usize) -> (usize, u64) {
    let mut below = random();
    let (mut live, mut bytes, mut requests) = (Vec::new(), 0, 0);
    for _ in 0..steps {
        let size = 1 + below(largest);
        if bytes + size <= most && (live.is_empty() || below(100) < 73) {
            live.push(pool.alloc_uninit::<u8>(size, stream).unwrap());
            (bytes, requests) = (bytes + size, requests + 1);
        } else {
            bytes -= live.swap_remove(below(live.len())).len();
        }
    }
    (requests, pool.stats().source_calls)
}

/// A pool in which hardly a request fits moves its memory at each, for a while; then it holds more.
#[test]
fn what_moves_all_the_time_gets_more_room() {
    let gpu = device(31, 64 << 30);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    let most = 16 << 30;
    at_random(&pool, &stream, most, 6000, 256 * MIB);
    let before = pool.stats();
    let (requests, calls) = at_random(&pool, &stream, most, 6000, 256 * MIB);
    let (moves, peak) = ((calls - before.source_calls) as usize, pool.stats().peak_reserved);
    assert!(moves * 20 < requests, "{moves} moves for {requests} requests");
    assert!(peak > most + most / 8 && peak <= most + most / 4 + 256 * MIB, "{peak}");
    clean(&gpu);
}

/// Where memory is short, pieces go on moving: what fits is served.
#[test]
fn what_moves_all_the_time_on_a_full_device_goes_on_moving() {
    let most = 1 << 30;
    let gpu = device(32, most + most / 3);
    let stream = gpu.new_stream().unwrap();
    let pool = DevicePool::new(&gpu, PoolConfig::default_gpu()).unwrap();
    pool.set_oom_callback(|_| panic!("nothing is short"));
    let (requests, calls) = at_random(&pool, &stream, most, 6000, 64 * MIB);
    assert!(calls as usize > requests / 20 && pool.stats().failed_count == 0, "{calls} calls");
    clean(&gpu);
}

/// Blocks of all sizes come and go in any order, so that pieces of memory move; each keeps what was written into it.
/// An error is one that the driver made, and leaves the pool whole.
fn moving(gpu: &GpuDevice, steps: usize) -> Option<Error> {
    const ENDS: usize = 64;
    let sim = gpu.simulation().unwrap();
    let streams = [gpu.new_stream().ok()?, gpu.new_stream().ok()?];
    let pool = DevicePool::new(gpu, PoolConfig::default_gpu().max_size(256 * MIB)).ok()?;
    let wrong = Arc::new(AtomicUsize::new(0));
    let mut below = random();
    let (mut live, mut bytes, mut failed) = (Vec::new(), 0, None);
    for step in 0..steps {
        let size = ENDS + below(24 * MIB);
        let stream = &streams[below(2)];
        if bytes + size <= 128 * MIB && below(100) < 70 {
            match pool.allocate_async(size, stream) {
                Ok(block) => {
                    let (at, tag) = (block.as_ptr() as usize, [step as u8; ENDS]);
                    let touches = [Touch::write(at, ENDS), Touch::write(at + size - ENDS, ENDS)];
                    let body = move |memory: &SimMemory<'_>| {
                        assert!(memory.write(at, &tag) && memory.write(at + size - ENDS, &tag));
                    };
                    // What is not written cannot be read.
                    let written = sim.launch(stream, 100, &touches, body).is_ok();
                    live.push((block, size, stream, written.then_some(tag)));
                    bytes += size;
                }
                Err(error) => failed = Some(error),
            }
        } else if !live.is_empty() {
            let (block, size, stream, tag) = live.swap_remove(below(live.len()));
            bytes -= size;
            let at = block.as_ptr() as usize;
            if let Some(tag) = tag {
                let touches = [Touch::read(at, ENDS), Touch::read(at + size - ENDS, ENDS)];
                let wrong = wrong.clone();
                let body = move |memory: &SimMemory<'_>| {
                    let mut found = [[0; ENDS]; 2];
                    let read = memory.read(at, &mut found[0]) && memory.read(at + size - ENDS, &mut found[1]);
                    wrong.fetch_add(usize::from(!read || found != [tag; 2]), Ordering::Relaxed);
                };
                let _ = sim.launch(stream, 100, &touches, body);
            }
            // SAFETY: a live block of this pool, whose work is on this stream.
            unsafe { pool.deallocate_async(block, stream) };
        }
        pool.check().unwrap();
    }
    for (block, _, stream, _) in live {
        // SAFETY: as above.
        unsafe { pool.deallocate_async(block, stream) };
    }
    sim.run_all();
    assert_eq!(wrong.load(Ordering::Relaxed), 0, "a block was written over");
    failed
}

#[test]
fn memory_that_moves_keeps_its_bytes_whichever_call_fails() {
    let gpu = device(34, 1 << 30);
    assert_eq!(moving(&gpu, 200), None);
    clean(&gpu);
    let sim = gpu.simulation().unwrap();
    let (made, mapped) = (sim.count("cuMemCreate"), sim.count("cuMemMap"));
    assert!(mapped > made + made / 4, "{mapped} mappings of {made} pieces: few moved");
    let total = sim.calls();
    let mut hit = 0;
    for nth in (1..=total).step_by(3) {
        let gpu = device(34, 1 << 30);
        let sim = gpu.simulation().unwrap();
        sim.fail_call(nth, 2);
        if let Some(error) = moving(&gpu, 200) {
            hit += 1;
            assert!(matches!(error, Error::Cuda { .. } | Error::OutOfMemory { .. }), "{error}");
        }
        sim.cancel_fault();
        clean(&gpu);
        assert_eq!(sim.memory_in_use(), 0, "call {nth}: memory was lost");
    }
    assert!(hit > 0, "not every failure can be absorbed");
}
