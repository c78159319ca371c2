"""The Kubernetes manifests: a kustomize base, KEDA in place of the HPA, and an overlay for long calls.

No preStop: no Service stands in front, dispatches come over the worker's own connection, so a pause before
SIGTERM would only let more of them in. The probes are the supervisor's: it answers /livez while it drains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from lastcall.supervisor.deploy.docker import PORT, USER
from lastcall.supervisor.deploy.service import Service, Timers, seconds

LONG_CALLS = Timers(grace=4 * 3600.0)
# Of about 25 voice jobs per 4 cores and 8 GiB, half: room for what comes while a pod starts.
JOBS_PER_POD = 12


def base(service: Service) -> Mapping[str, str]:
    """Return the base's resources by file name."""
    return {
        "deployment.yaml": _deployment(service),
        "pdb.yaml": _pdb(service),
        "hpa.yaml": _hpa(service),
        "networkpolicy.yaml": _network_policy(service),
    }


def stream(service: Service) -> str:
    """Return the base's resources as one stream, for `kubectl apply -f -`."""
    return service.header + "---\n" + "---\n".join(base(service).values())


def kustomization(service: Service) -> str:
    """Return the base's kustomization."""
    resources = "".join(f"  - {name}\n" for name in base(service))
    return f"""{service.header}\
# Give your image from an overlay: images: [{{name: {service.name}, newName: ..., newTag: ...}}]
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
{resources}"""


def _deployment(service: Service) -> str:
    name, timers = service.name, service.timers
    pre_stop = ""
    if timers.pre_stop:
        pre_stop = f"""\
          lifecycle:
            preStop:
              sleep:
                seconds: {timers.pre_stop}
"""
    return f"""\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels:
    app.kubernetes.io/name: {name}
spec:
  # No replicas: their number is the autoscaler's.
  selector:
    matchLabels:
      app.kubernetes.io/name: {name}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 0
      maxSurge: 25%
  # Draining pods do not count towards it.
  progressDeadlineSeconds: 600
  template:
    metadata:
      labels:
        app.kubernetes.io/name: {name}
      annotations:
        prometheus.io/scrape: "true"
        prometheus.io/port: "{PORT}"
        cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
    spec:
      # preStop {timers.pre_stop} + grace {seconds(timers.grace)} + {timers.margin}
      terminationGracePeriodSeconds: {timers.pod_kill_after}
      automountServiceAccountToken: false
      # A Service called {name} would inject variables that look like options.
      enableServiceLinks: false
      securityContext:
        runAsNonRoot: true
        runAsUser: {USER}
        runAsGroup: {USER}
        fsGroup: {USER}
        seccompProfile:
          type: RuntimeDefault
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              app.kubernetes.io/name: {name}
      containers:
        - name: agent
          image: {json.dumps(service.image_or_default)}
          args: [{json.dumps(service.target)}]
          env:
            - name: LASTCALL_GRACE
              value: "{seconds(timers.grace)}"
            # What is left of the grace period when SIGTERM comes; lastcall doctor compares.
            - name: LASTCALL_PLATFORM_GRACE
              value: "{timers.kill_after}"
            - name: LASTCALL_WORKERS
              value: "{service.workers}"
            - name: LASTCALL_HTTP
              value: "0.0.0.0:{PORT}"
            # There is no CPU limit to count cores by, so the load is measured against the request.
            - name: NUM_CPUS
              valueFrom:
                resourceFieldRef:
                  resource: requests.cpu
          envFrom:
            # LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET and the agent's own keys
            - secretRef:
                name: {name}
          ports:
            - name: http
              containerPort: {PORT}
          startupProbe:
            httpGet:
              path: /livez
              port: http
            periodSeconds: 1
            failureThreshold: 120
          # 200 while it drains, and never a matter of load: a busy or draining pod must not be restarted.
          livenessProbe:
            httpGet:
              path: /livez
              port: http
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          # 200 when a worker is registered: what a rollout waits for.
          readinessProbe:
            httpGet:
              path: /readyz
              port: http
            periodSeconds: 5
            timeoutSeconds: 5
{pre_stop}\
          resources:
            requests:
              cpu: "4"
              memory: 8Gi
            limits:
              memory: 8Gi
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: ["ALL"]
          volumeMounts:
            - name: tmp
              mountPath: /tmp
      volumes:
        - name: tmp
          emptyDir: {{}}
"""


def _pdb(service: Service) -> str:
    return f"""\
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {service.name}
spec:
  # Not minAvailable: with as many replicas as that, no node could ever be drained.
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      app.kubernetes.io/name: {service.name}
"""


def _hpa(service: Service) -> str:
    return f"""\
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {service.name}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {service.name}
  minReplicas: 2
  maxReplicas: 20
  metrics:
    # Served by an adapter for custom metrics, summed over slots; terminating pods are not counted.
    - type: Pods
      pods:
        metric:
          name: lastcall_jobs_running
        target:
          type: AverageValue
          averageValue: "{JOBS_PER_POD}"
  behavior:
    scaleUp:
      stabilizationWindowSeconds: 0
    # Every pod taken away drains for up to grace, so take them slowly.
    scaleDown:
      stabilizationWindowSeconds: 600
      policies:
        - type: Pods
          value: 1
          periodSeconds: 120
"""


def _network_policy(service: Service) -> str:
    return f"""\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {service.name}
spec:
  podSelector:
    matchLabels:
      app.kubernetes.io/name: {service.name}
  policyTypes: [Ingress, Egress]
  ingress:
    # Scrapes; the node's own probes need no rule.
    - from:
        - namespaceSelector:
            matchLabels:
              kubernetes.io/metadata.name: monitoring
      ports:
        - port: http
  egress:
    - ports:
        - port: 53
          protocol: UDP
        - port: 53
          protocol: TCP
    # LiveKit's signalling, ICE over TCP and TURN, the providers' APIs, and media; not the cloud's metadata.
    - to:
        - ipBlock:
            cidr: 0.0.0.0/0
            except: [169.254.169.254/32]
        - ipBlock:
            cidr: ::/0
      ports:
        - port: 443
          protocol: TCP
        - port: 5349
          protocol: TCP
        - port: 7880
          protocol: TCP
        - port: 7881
          protocol: TCP
        - port: 443
          protocol: UDP
        - port: 3478
          endPort: 65535
          protocol: UDP
"""


# -- beside the base ---------------------------------------------------------------------------------------


def keda(service: Service) -> Mapping[str, str]:
    """Return the component that puts a KEDA ScaledObject in place of the HPA, by file name."""
    name = service.name
    # One pod's jobs over all its slots, draining pods left out: they take nothing new.
    running = f'sum by (pod) (lastcall_jobs_running{{pod=~"{name}-.*"}})'
    draining = f'max by (pod) (lastcall_stopping{{pod=~"{name}-.*"}}) == 1'
    scaled = f"""\
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {name}
spec:
  scaleTargetRef:
    name: {name}
  pollingInterval: 15
  # Rules scaling to zero only, which two replicas at least exclude.
  cooldownPeriod: 600
  minReplicaCount: 2
  maxReplicaCount: 20
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: 600
          policies:
            - type: Pods
              value: 1
              periodSeconds: 120
  triggers:
    - type: prometheus
      metricType: AverageValue
      metadata:
        # Where your Prometheus is.
        serverAddress: http://prometheus.monitoring.svc:9090
        query: >-
          sum({running}
          unless on (pod) ({draining})) or vector(0)
        threshold: "{JOBS_PER_POD}"
"""
    component = f"""\
# Use it from an overlay: components: [../keda]
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
resources:
  - scaledobject.yaml
patches:
  # KEDA makes an HPA of its own; two of them would fight.
  - patch: |-
      apiVersion: autoscaling/v2
      kind: HorizontalPodAutoscaler
      metadata:
        name: {name}
      $patch: delete
"""
    return {"kustomization.yaml": component, "scaledobject.yaml": scaled}


def long_calls(service: Service) -> Mapping[str, str]:
    """Return the overlay for calls of hours: a longer grace, and scale-downs that are rarer still."""
    name, timers = service.name, LONG_CALLS
    overlay = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - ../base
components:
  - ../keda
patches:
  - path: deployment.yaml
  - path: scaledobject.yaml
"""
    deployment = f"""\
# Node shutdown and cloud autoscalers may allow less than the pod does, often 10 minutes: raise them too.
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
spec:
  template:
    spec:
      # preStop {timers.pre_stop} + grace {seconds(timers.grace)} + {timers.margin}
      terminationGracePeriodSeconds: {timers.pod_kill_after}
      containers:
        - name: agent
          env:
            - name: LASTCALL_GRACE
              value: "{seconds(timers.grace)}"
            - name: LASTCALL_PLATFORM_GRACE
              value: "{timers.kill_after}"
"""
    scaled = f"""\
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {name}
spec:
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: 1800
          policies:
            - type: Pods
              value: 1
              periodSeconds: 600
"""
    return {"kustomization.yaml": overlay, "deployment.yaml": deployment, "scaledobject.yaml": scaled}
