//! Typed memory in one call: zeroed, freed when dropped, from the default pool or from one with a name.

use memory_pool::{PoolConfig, PoolManager, Result};

fn main() -> Result<()> {
    // The default pool is made at the first call, as MEMORY_POOL_… in the environment says.
    let mut samples = memory_pool::allocate::<f32>(48_000)?;
    for (n, sample) in samples.iter_mut().enumerate() {
        *sample = (n as f32 * 440.0 * std::f32::consts::TAU / 48_000.0).sin();
    }
    let loudest = samples.iter().fold(0.0f32, |loudest, sample| loudest.max(sample.abs()));
    println!("a second of sound, peak {loudest:.2}");

    PoolManager::global().create_cpu_pool("pictures", PoolConfig::default_cpu().max_size(16 << 20))?;
    let picture = memory_pool::allocate_in::<u32>("pictures", 640 * 480)?;
    println!("{} black pixels", picture.iter().filter(|&&pixel| pixel == 0).count());

    // From one to the other, wherever their memory is.
    let mut copy = memory_pool::allocate::<u32>(picture.len())?;
    PoolManager::global().copy_slice(&mut *copy, &*picture)?;

    println!("too much: {}", memory_pool::allocate_in::<u64>("pictures", 4 << 20).unwrap_err());
    Ok(())
}
