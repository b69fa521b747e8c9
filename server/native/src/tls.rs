//! TLS settings from PEM files' contents.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

/// Contents of PEM files. With `client_ca`, clients need a certificate of that authority.
pub struct Pem<'a> {
    pub certificate: &'a [u8],
    pub key: &'a [u8],
    pub client_ca: Option<&'a [u8]>,
}

/// The settings of a port that speaks `protocol`, as ALPN names it, or what is wrong with the files.
pub fn config(pem: &Pem, protocol: &str) -> Result<Arc<ServerConfig>, String> {
    let chain = certificates(pem.certificate, "tls_certificate")?;
    let key = PrivateKeyDer::from_pem_slice(pem.key).map_err(|e| format!("tls_key: {e}"))?;
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = if let Some(ca) = pem.client_ca {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca, "tls_client_ca")? {
            roots
                .add(certificate)
                .map_err(|e| format!("tls_client_ca: {e}"))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|e| format!("tls_client_ca: {e}"))?;
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|e| format!("tls_certificate and tls_key: {e}"))?;
    config.alpn_protocols = vec![protocol.into()];
    Ok(Arc::new(config))
}

fn certificates(pem: &[u8], name: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(list) if list.is_empty() => Err(format!("{name}: the file holds no certificate")),
        Ok(list) => Ok(list),
        Err(e) => Err(format!("{name}: {e}")),
    }
}
