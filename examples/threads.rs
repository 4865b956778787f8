//! One pool, several threads: shared handles, blocks that are freed by another thread, and a pool of one thread.

use std::sync::mpsc;
use std::thread;

use allocator_api2::vec::Vec;
use memory_pool::{LocalVariablePool, PoolConfig, Result, VariablePool};

fn main() -> Result<()> {
    let pool = VariablePool::new(PoolConfig::default_cpu())?;
    let (sender, receiver) = mpsc::channel();

    // Producers fill messages, the consumer frees them.
    let producers: std::vec::Vec<_> = (0..3u8)
        .map(|producer| {
            let (pool, sender) = (pool.clone(), sender.clone());
            thread::spawn(move || {
                for length in 1..=1000 {
                    let mut message = Vec::new_in(pool.clone());
                    message.resize(length, producer);
                    if sender.send(message).is_err() {
                        return;
                    }
                }
            })
        })
        .collect();
    drop(sender);
    let bytes: usize = receiver.into_iter().map(|message| message.len()).sum();
    producers.into_iter().for_each(|producer| producer.join().expect("no producer panics"));
    println!("{bytes} bytes went through\n{}", pool.stats());

    // Where one thread is enough, nothing is locked and the compiler sees to it that it stays one thread.
    let mut scratch = LocalVariablePool::new(PoolConfig::default_cpu())?;
    for line in ["to be", "or not to be"] {
        let words = {
            let mut words = Vec::new_in(&scratch);
            words.extend(line.split(' '));
            words.len()
        };
        println!("{words} words");
        scratch.reset();
    }
    Ok(())
}
